"""What the demo's agents read: incident reports, and a handbook for each role. Made up by rule, always the same."""

from __future__ import annotations

from random import Random

_SERVICES = ("checkout", "search", "billing", "identity", "catalogue", "messaging", "reporting", "gateway")
_PARTS = (
    *("connection pool", "write-ahead log", "retry queue", "feature flag", "leader election", "rate limiter"),
    *("schema migration", "certificate", "background job", "read replica", "cache layer", "DNS record"),
)
_SYMPTOMS = (
    *("timed out", "returned stale data", "was saturated", "lost its quorum", "rejected valid requests"),
    *("restarted in a loop", "doubled its latency", "dropped one in nine messages"),
)
_ACTIONS = (
    *("rolled back the release", "failed over to the second region", "raised the limit by hand"),
    *("drained the affected hosts", "disabled the flag", "replayed the queue", "restarted the primary"),
)
_RULES = (
    "When the {service} service's {part} {symptom}, ask first what changed in the hour before.",
    "A {part} that {symptom} twice in a quarter needs an owner and a date, not another alert.",
    "Never accept '{action}' as a root cause: it is what ended the incident, not what began it.",
    "If the {service} service {symptom} while the {part} looked healthy, say which measurement was missing.",
    "Distinguish what the {part} did from what its dashboard showed when it {symptom}.",
    "Whoever {action} should be named by role, together with the time it took to decide on it.",
    "Count the customers of the {service} service who noticed before we did, and say how they told us.",
)

EXPERTS = {
    "reliability": "how the failure spread and what would have contained it",
    "database": "whether data was lost, duplicated or read stale",
    "network": "what the connections, names and certificates did",
    "security": "whether an attacker could have caused or used this",
    "capacity": "which limit was reached first, and how much room was left",
    "support": "what customers saw, and what they were told",
    "release": "which change set it off, and why no test caught it",
    "privacy": "whether anybody saw data that was not theirs",
    "storage": "what filled up, and what was not cleaned",
    "mobile": "what clients that cannot be updated did meanwhile",
    "finance": "what it cost, in refunds and in hours",
    "process": "who decided what, when, and on which evidence",
    "monitoring": "which alert came late, and which came for nothing",
    "partners": "what companies that depend on us noticed",
}
"""Experts of the map-reduce: name, and what it looks at."""

DEBATERS = {
    "rollback": "the safest way out is to undo the last change",
    "fix_forward": "the quickest way out is to repair in place",
    "moderator": "both sides must be weighed by what the report proves",
}
"""Sides of the debate: name, and what it holds."""

SUMMARIZER = "You write the summary that the whole company reads. Join the experts' findings, and name disagreements."


def handbook(role: str, duty: str, rules: int = 24) -> str:
    """A role's system prompt, about 26 tokens a rule: the same in every call of that role."""
    random = Random(role)
    lines = [f"You review incidents for the role '{role}'. Your concern: {duty}. Follow the handbook."]
    lines += [f"{number}. {_sentence(random, random.choice(_RULES))}" for number in range(1, rules + 1)]
    return "\n".join(lines)


def report(number: int, events: int = 4) -> str:
    """An incident report, about 20 tokens an event."""
    random = Random(f"report {number}")
    minute = random.randrange(600, 900)
    lines = [f"Incident {4100 + number}. Service: {random.choice(_SERVICES)}. Timeline:"]
    for _ in range(events):
        minute += random.randrange(1, 14)
        event = random.choice(("The {service} {part} {symptom}.", "The {part} {symptom}; the team {action}."))
        lines.append(f"{minute // 60:02d}:{minute % 60:02d} {_sentence(random, event)}")
    return "\n".join(lines)


def _sentence(random: Random, form: str) -> str:
    return form.format(
        service=random.choice(_SERVICES),
        part=random.choice(_PARTS),
        symptom=random.choice(_SYMPTOMS),
        action=random.choice(_ACTIONS),
    )
