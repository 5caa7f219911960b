"""What users choose and ask: command line, settings, request options, grammars, routes and reports."""
