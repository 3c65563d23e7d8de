"""The command line: a function per verb, parsing, and what a terminal sees."""
