"""Run folders, the table of commands, and the one way to run a command in its folder."""
