"""The report of a comparison: what it draws, and the page."""
