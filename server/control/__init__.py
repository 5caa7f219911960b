"""What users choose and ask: command line, options, safety, grammars, reports."""
