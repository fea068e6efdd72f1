"""Rewrite rules of the simplify pass: algebra, data movement, and composed operators that exporters took apart."""
