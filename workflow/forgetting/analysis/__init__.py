"""Statistics of results: confidence intervals and comparisons of methods."""
