"""One file per command: it turns a config into a run folder. Commands communicate only through files."""
