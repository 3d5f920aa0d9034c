"""What a type checker should find: each line that is wrong says which error it expects."""

from __future__ import annotations

from reliable_tasks import apply_reliable_config, once, presets

once(lock="until_exec")  # type: ignore[call-overload]
once(on_conflict="skip")  # type: ignore[call-overload]
once(timeout=5)  # type: ignore[call-overload]
once(key=7)  # type: ignore[call-overload]
presets.time_limit(soft=5)  # type: ignore[call-arg]
presets.rate_limit(10)  # type: ignore[arg-type]
apply_reliable_config("shop")  # type: ignore[arg-type]
