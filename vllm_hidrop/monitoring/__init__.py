"""Dashboards, rules and a Prometheus to try them with."""
