"""One report.json rendered for people, and the model card written from the record."""
