"""The command `sld-run`, and the parts that all commands share."""
