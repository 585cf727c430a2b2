"""The forecast of a refresh against sums done by hand and a run played through."""

import math

import pytest

from ragjax.index import scann_options
from ragjax.refresh import RefreshWork, estimate_build_seconds, forecast_refresh

MIB = 2**20
GIVEN = {
    "documents": 100_000,
    "dim": 384,
    "encode_documents_per_second": 400.0,
    "build_seconds": 50.0,
    "step_seconds": 2.0,
    "steps_between": 500.0,
    "kept_generations": 3,
    "bytes_per_value": 4,
    "parameter_bytes": 90 * MIB,
    "shared_device": True,
    "free_bytes": 2**40,
}


def test_sums_by_hand():
    forecast = forecast_refresh(RefreshWork(**GIVEN))
    assert forecast.encode_seconds == 250.0
    assert forecast.refresh_seconds == 300.0
    assert forecast.fastest_steps == 150
    assert forecast.overhead == pytest.approx(300 / (500 * 2))
    embeddings = 100_000 * 384
    assert forecast.bytes_on_disk == 4 * embeddings * 4 + 4 * 90 * MIB
    assert forecast.bytes_in_memory == 3 * embeddings * 4 + 90 * MIB
    assert forecast.keeps_up and forecast.fits_disk
    assert forecast.warnings() == []


def staleness_of_a_run(*, refresh_seconds, step_seconds, every, num_steps):
    """Plays a run on spare devices: exports every n steps, or when the last refresh is done."""
    serves, running, last, seen = 0, None, 0, []
    for step in range(num_steps):
        now = step * step_seconds
        if running is not None and now >= running[1]:
            serves, running = running[0], None
        if running is None and step > 0 and step - last >= every:
            running, last = (step, now + refresh_seconds), step
        seen.append(step - serves)
    settled = seen[num_steps // 2 :]
    return sum(settled) / len(settled), max(settled)


@pytest.mark.parametrize(
    ("step_seconds", "every"), [(2.0, 500), (2.0, 150), (2.0, 90), (7.0, 60), (7.0, None)]
)
def test_staleness_is_that_of_a_run_played_through(step_seconds, every):
    values = GIVEN | {"step_seconds": step_seconds, "steps_between": every, "shared_device": False}
    forecast = forecast_refresh(RefreshWork(**values))
    mean, longest = staleness_of_a_run(
        refresh_seconds=300.0, step_seconds=step_seconds, every=every or 1, num_steps=60_000
    )
    assert forecast.mean_staleness_steps == pytest.approx(mean, rel=0.02)
    assert forecast.max_staleness_steps == longest


def test_spare_devices_cost_the_training_nothing():
    forecast = forecast_refresh(RefreshWork(**GIVEN | {"shared_device": False}))
    assert forecast.overhead == 0.0
    assert "costs the training no time" in forecast.describe()
    assert "30.0%" in forecast_refresh(RefreshWork(**GIVEN)).describe()


@pytest.mark.parametrize(("steps", "keeps_up"), [(150.0, True), (149.0, False), (10.0, False)])
def test_what_cannot_be_kept_up_is_said_with_what_could_be(steps, keeps_up):
    forecast = forecast_refresh(RefreshWork(**GIVEN | {"steps_between": steps}))
    assert forecast.keeps_up == keeps_up
    assert len(forecast.warnings()) == (not keeps_up)
    if not keeps_up:
        (warning,) = forecast.warnings()
        assert "refresh every 150 steps or more" in warning
        assert f"every {steps:,.0f} steps cannot" in warning
        assert "spare devices" in warning
        assert f"warning: {warning}" in forecast.describe()
        assert forecast.overhead == pytest.approx(300 / (steps * 2))
        assert f"would cost {forecast.overhead:,.1%}" in forecast.describe()
        spare = forecast_refresh(
            RefreshWork(**GIVEN | {"steps_between": steps, "shared_device": False})
        )
        assert "encode on more devices" in spare.warnings()[0]


def test_a_disk_that_is_too_small_is_said_with_the_remedy():
    needed = 4 * (100_000 * 384 * 4 + 90 * MIB)
    assert forecast_refresh(RefreshWork(**GIVEN | {"free_bytes": needed})).fits_disk
    forecast = forecast_refresh(RefreshWork(**GIVEN | {"free_bytes": needed - 5 * MIB}))
    (warning,) = forecast.warnings()
    assert "too small by 5.0 MiB: store float16" in warning
    more = forecast_refresh(RefreshWork(**GIVEN | {"free_bytes": needed, "kept_generations": 4}))
    assert "keep fewer than 4 generations" in more.warnings()[0]
    assert warning in forecast.describe()


def test_as_soon_as_possible_goes_as_fast_as_it_can():
    forecast = forecast_refresh(RefreshWork(**GIVEN | {"steps_between": None}))
    assert forecast.keeps_up and forecast.overhead == pytest.approx(1.0)
    assert (forecast.mean_staleness_steps, forecast.max_staleness_steps) == (150 + 149 / 2, 299)
    assert "as soon as possible" in forecast.describe()


def test_never_costs_nothing_and_grows_stale_without_end():
    forecast = forecast_refresh(RefreshWork(**GIVEN | {"steps_between": math.inf}))
    assert forecast.overhead == 0.0 and forecast.keeps_up
    assert forecast.max_staleness_steps == math.inf
    assert forecast.describe() == "refresh: never; the initial index serves to the end of the run"


def test_the_description_has_the_figures():
    assert forecast_refresh(
        RefreshWork(**GIVEN | {"free_bytes": 2**40})
    ).describe().splitlines() == [
        "refresh: every 500 steps, 100,000 documents in about 5.0 min (encoding 4.2 min, building"
        " the index 50 s)",
        "costs 30.0% on top of the training time, on the device that trains",
        "the index lags 400 steps behind on average and 649 at most",
        "about 945.9 MiB on disk (1,024.0 GiB free) and 529.5 MiB of memory while a refresh runs",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("documents", 0),
        ("dim", 0),
        ("encode_documents_per_second", 0.0),
        ("encode_documents_per_second", math.nan),
        ("step_seconds", 0.0),
        ("bytes_per_value", 0),
        ("steps_between", 0.0),
        ("build_seconds", -1.0),
        ("kept_generations", -1),
        ("parameter_bytes", -1),
        ("free_bytes", -1),
    ],
)
def test_sizes_and_times_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*, got {value}"):
        forecast_refresh(RefreshWork(**GIVEN | {name: value}))


def test_a_build_is_estimated_by_kind_and_size():
    per_value = [
        estimate_build_seconds(size, 100, "scann") / size / 100
        for size in (19_999, 20_000, 99_999, 100_000)
    ]
    assert per_value[0] < per_value[1] == per_value[2] < per_value[3]
    assert estimate_build_seconds(200_000, 384, "scann") == pytest.approx(50, rel=0.1)
    assert estimate_build_seconds(200_000, 384, "exact") < 1
    with pytest.raises(ValueError, match='"exact" or "scann", got \'faiss\''):
        estimate_build_seconds(1000, 100, "faiss")
    with pytest.raises(ValueError, match="documents must be positive, got 0"):
        estimate_build_seconds(0, 100, "scann")


def test_the_rate_changes_where_scann_is_built_in_another_way():
    kinds = [
        (options.dimensions_per_block > 0, options.num_leaves > 0)
        for options in map(scann_options, (19_999, 20_000, 99_999, 100_000))
    ]
    assert kinds == [(False, False), (True, False), (True, False), (True, True)]
