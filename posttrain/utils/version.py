"""The version of this package, which pyproject.toml has as well."""

VERSION = "0.1.0"
