"""Answers, likelihoods and their scores."""
