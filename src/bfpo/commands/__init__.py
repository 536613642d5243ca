"""One file a command, named as the command: its settings become a run folder. Commands meet only through files."""
