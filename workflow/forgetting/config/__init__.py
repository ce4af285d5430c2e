"""The study: what a YAML file may say, with types, defaults and checks."""
