"""Tables of a study: downloaded, read, checked, tokenized and packed."""
