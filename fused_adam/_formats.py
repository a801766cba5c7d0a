"""Which rules are offered with parameters, gradients and states in fewer bits; all else is float32 or float64 alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from fused_adam import _numbers
from fused_adam._codegen import Rule
from fused_adam._storage import Format

# (p, gradient, states, master)
FORMATS = tuple(
    Format(*row)
    for row in (
        ("bfloat16", "bfloat16", "float32", None),
        ("bfloat16", "float32", "float32", None),
        ("float16", "float16", "float32", None),
        ("bfloat16", "bfloat16", "bfloat16", None),
        ("float32", "float32", "bfloat16", None),
        ("bfloat16", "bfloat16", "float32", "float32"),
        ("float16", "float16", "float32", "float32"),
        ("bfloat16", "bfloat16", "float32", "split16"),
        ("bfloat16", "bfloat16", "bfloat16", "split16"),
    )
)
RULES = ("momentum", "adam", "adamw", "lion", "lionw")
# What only rules have that keep m and v.
FORMATS_OF_ADAM = tuple(
    Format(*row)
    for row in (
        ("float32", "float32", "int8", None),
        ("bfloat16", "bfloat16", "int8", None),
        ("bfloat16", "bfloat16", "int8", "float32"),
        ("bfloat16", "bfloat16", "int8", "split16"),
        ("bfloat16", "bfloat16", "int8", "split8"),
        ("bfloat16", "bfloat16", "bfloat16", "split8"),
    )
)
ADAM = ("adam", "adamw")
_ALL = (*FORMATS, *FORMATS_OF_ADAM)


class Storage(NamedTuple):
    """How an optimizer was asked to keep numbers.

    dtype: what uint16 arrays hold. The others as in `SGD`.
    """

    master: str | None = None
    state_dtype: str | None = None
    stochastic_rounding: bool = False
    seed: int = 0
    dtype: str | None = None

    @classmethod
    def checked(
        cls,
        master: str | None = None,
        state_dtype: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        dtype: str | None = None,
    ) -> Storage:
        """From arguments. Raises TypeError or ValueError."""
        _one_of("master", master, {f.master for f in _ALL if f.master})
        _one_of("state_dtype", state_dtype, {f.states for f in _ALL})
        _one_of("dtype", dtype, {"bfloat16"})
        return cls(
            master,
            state_dtype,
            _numbers.flag("stochastic_rounding", stochastic_rounding),
            _numbers.step_number(seed, least=0, name="seed"),
            dtype,
        )

    def format(self, p: str) -> Format | None:
        """That of parameters kept so; None for float32 or float64 alone. The gradient's is not known yet.

        Raises ValueError where no rule is offered in it.
        """
        if p in ("float32", "float64") and self.master is None and self.state_dtype in (None, "float32", p):
            if self.stochastic_rounding:
                raise ValueError(
                    f"stochastic_rounding is for what is kept in 16 bits; parameters are {p}: leave it out"
                )
            return None
        found = Format(p, p, self.state_dtype or "float32", self.master, self.stochastic_rounding)
        if not any(_alike(found, f) for f in _ALL):
            raise ValueError(f"{describe(found)} is not offered; there are {_list(_ALL)}")
        return found


def refuse_rule(rule: Rule, f: Format, name: str) -> None:
    """Raises ValueError unless the rule is offered."""
    core = (rule.base or rule).name
    offered = RULES if any(_alike(f, other) for other in FORMATS) else ADAM
    if core not in offered:
        raise ValueError(f"{name}: the rule {core} is not offered with {describe(f)}; {', '.join(offered)} are")


def refuse_gradient(f: Format, name: str) -> None:
    """Raises ValueError unless gradients of this kind are offered."""
    if f._replace(stochastic_rounding=False) not in _ALL:
        offered = [other for other in _ALL if _alike(other, f)]
        raise ValueError(f"{name}: {describe(f)} is not offered; there are {_list(offered)}")


def describe(f: Format) -> str:
    """As messages call it."""
    master = f" and master={f.master!r}" if f.master else ""
    return f"{f.p} parameters with {f.g} gradients, {f.states} states{master}"


def _alike(a: Format, b: Format) -> bool:
    """But for the gradient."""
    return (a.p, a.states, a.master) == (b.p, b.states, b.master)


def _list(formats: Iterable[Format]) -> str:
    return "; ".join(map(describe, formats))


def _one_of(name: str, x: Any, known: set[str]) -> None:
    if x is not None and x not in known:
        raise ValueError(f"{name} should be None or one of {', '.join(sorted(known))}, got {x!r}")
