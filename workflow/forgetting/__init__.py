"""Measure how much new knowledge fine-tuning gains and how much old knowledge it loses.

Packages in the order of the data flow; each imports only from those before it:

    config -> data -> models -> evaluation -> benchmarks -> study -> training
    -> analysis -> results -> report, pipeline
"""
