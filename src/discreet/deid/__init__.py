"""De-identification: text in, text out. Knows nothing of datasets, and writes no statements."""
