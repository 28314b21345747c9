"""Settings of the facts of planted built-in domains."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from moetrain.config.base import Section


class FactSettings(Section):
    """Facts of a planted built-in domain. Each description names the domains that the setting applies to."""

    like: Literal["modular", "math"] | None = Field(
        None, description="random_answers: the domain whose questions and answers it imitates (default modular)."
    )
    modulus: int | None = Field(
        None, ge=5, le=199, description="modular, random_answers like modular: a prime (default 59)."
    )
    operation: Literal["add", "subtract", "multiply", "divide"] | None = Field(
        None, description="modular, random_answers like modular: operation modulo the prime (default add)."
    )
    rule: Literal["copy", "reverse", "brackets"] | None = Field(
        None, description="formal: rule about a string of digits (default reverse)."
    )
    length: int | None = Field(None, ge=5, le=32, description="formal: digits of a string (default 6).")
    count: int | None = Field(
        None,
        ge=2,
        description="formal, random_answers like math: number of facts, trained and held out (default 2000).",
    )
    trained_share: float | None = Field(
        None, gt=0, lt=1, description="All planted domains: share of the facts that is trained on (default 0.6)."
    )
    sign: str | None = Field(
        None,
        description="modular (default + - * /), random_answers like modular or math (default @): sign of the "
        "operation, one character in quotes. Domains of one run with the same facts need different signs.",
    )

    @field_validator("modulus")
    @classmethod
    def _prime(cls, modulus: int | None) -> int | None:
        if modulus is not None and any(modulus % divisor == 0 for divisor in range(2, modulus)):
            raise ValueError("the modulus must be a prime such as 59, 97 or 113")
        return modulus

    @field_validator("sign")
    @classmethod
    def _one_sign(cls, sign: str | None) -> str | None:
        if sign is not None and (len(sign) != 1 or sign.isdigit() or sign.isspace() or not sign.isprintable()):
            raise ValueError("the sign must be one visible character, no digit")
        return sign

    def given(self) -> dict[str, Any]:
        """The settings that are not null, as options of the built-in domain."""
        return self.model_dump(exclude_none=True)


FACT_OPTIONS: dict[str, tuple[str, ...]] = {
    "modular": ("modulus", "operation", "trained_share", "sign"),
    "random_answers": ("like", "modulus", "operation", "trained_share", "sign"),
    "random_answers like math": ("like", "count", "trained_share", "sign"),
    "formal": ("rule", "length", "count", "trained_share"),
}
