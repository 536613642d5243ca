"""Run folders, the table of stages, and the function that runs a stage in its folder."""
