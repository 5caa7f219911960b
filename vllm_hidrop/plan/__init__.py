"""What a request keeps, stage by stage, as host data: schedules, plans, places, costs. Imports no torch."""
