"""The rules, in families. Importing this package fills `normkit.checks.rule.RULES`."""

from normkit.checks.rules import buffers as buffers
from normkit.checks.rules import gap as gap
