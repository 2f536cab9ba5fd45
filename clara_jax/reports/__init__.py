"""Self-contained pages, plots and tables."""
