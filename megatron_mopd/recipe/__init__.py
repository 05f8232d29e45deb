"""A recipe of stages in one file: its schema, its graph, the command that runs it and its report."""
