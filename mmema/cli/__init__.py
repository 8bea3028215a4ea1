"""The commands of mmema: parse, call, print."""
