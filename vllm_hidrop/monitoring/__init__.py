"""Dashboards, rules and a Prometheus to try them with. Knows metrics by name; not how they are counted."""
