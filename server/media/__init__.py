"""Clients' media: what parts and images may be, where they may come from, and how they are fetched and decoded."""
