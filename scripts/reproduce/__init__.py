"""The paper reproduced: its models, its protocol, its claims and its tables. `python -m scripts.reproduce --help`."""
