"""`/playground`, one page."""
