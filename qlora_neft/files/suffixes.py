"""What kinds of files are told apart by their names, for the recipe that names them and the parts that read them."""

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")
