"""The sections of a study file, a module each: every key, its type, default and meaning."""
