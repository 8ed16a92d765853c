"""What every section shares: strict, frozen, with the numbers people write in YAML."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _yaml_exponent(value: Any) -> Any:
    """YAML 1.1 readers (pyflyte's is one) hand over `1e-4` as text; everyone who writes it means the number."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def no_flag(value: Any) -> Any:
    """`true` equals 1 in Python, but nobody who writes it means the number."""
    return str(value).lower() if isinstance(value, bool) else value


Number = Annotated[float, BeforeValidator(_yaml_exponent), Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Positive = Annotated[PositiveInt, Field(le=10**12)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Config(BaseModel):
    """A frozen section; an unknown key and a value of another type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
