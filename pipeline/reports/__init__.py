"""Pages and tables that people read: score table, model card, report, history. Equal records give equal files."""
