"""The rules, in families. Importing this package fills `normkit.checks.rule.RULES`."""

from normkit.checks.rules import buffers as buffers
from normkit.checks.rules import conventions as conventions
from normkit.checks.rules import counts as counts
from normkit.checks.rules import gap as gap
from normkit.checks.rules import modes as modes
from normkit.checks.rules import optimizer as optimizer
from normkit.checks.rules import ranks as ranks
from normkit.checks.rules import structure as structure
from normkit.checks.rules import updates as updates
