"""The main job, shown: four actors, the same ten things each, and what a real server executed."""
