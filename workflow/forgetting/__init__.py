"""How much new knowledge fine-tuning gains, and how much old knowledge it loses.

The modules read in the order in which data flows, each importing only what stands before it:

    study -> world, data -> models, pretrain -> forward -> probes -> select -> train -> run group
    -> benchmarks, sandbox -> collect -> report
"""
