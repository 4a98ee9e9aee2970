"""The HTTP surface, generated from the schemas of tasks."""
