"""The plan of a run: restart rules, the planner, plateaus, rewinds and advice."""
