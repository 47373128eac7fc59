"""Inputs that went wrong once, or that are known to."""
from dataclasses import dataclass

from fuzz.oracle import Input


@dataclass(frozen=True)
class Case:
    given: Input
    code: int
    words: str


NAMED: list[Case] = []
