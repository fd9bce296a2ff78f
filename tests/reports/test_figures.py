"""Figures hold what the runs hold: every point, line and name, whatever the names are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from synthetic import NASTY

from usllm.reports.axes import plain_number
from usllm.reports.block_figures import block_errors
from usllm.reports.curve_figures import training_curves
from usllm.reports.figures import Reference, pareto_front, perplexity_by_bytes, perplexity_by_rate
from usllm.reports.heat_maps import ERROR, RATE, STRIPS, grid, heat_maps, quantities
from usllm.reports.labels import texts_of
from usllm.reports.runs import Layer, Run
from usllm.reports.style import png, shortened, spread, svg, themed

sizes = st.lists(st.tuples(st.floats(0.1, 4), st.floats(1, 1e6)), min_size=1, max_size=20)


def texts_in(figure: Figure) -> str:
    return svg(figure, "test")


@given(sizes)
def test_front_holds_exactly_the_points_that_nothing_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    assert front == sorted(front)
    for size, loss in points:
        beaten = any(s <= size and v <= loss and (s, v) != (size, loss) for s, v in points)
        assert ((size, loss) in front) == (not beaten)


@given(st.text(max_size=80), st.integers(3, 60))
def test_shortened_names_fit_and_keep_both_ends(name: str, length: int) -> None:
    short = shortened(name, length)
    assert len(short) <= max(length, 3)
    assert (short == name) == (len(name) <= length)
    assert short[:1] == name[:1]
    assert short[-1:] == name[-1:]


@given(st.lists(st.floats(0, 1), max_size=12).map(sorted), st.floats(0.01, 0.5))
def test_spread_names_keep_their_order_and_distance(places: list[float], distance: float) -> None:
    moved = spread(places, distance, 0.0, 1.0)
    assert moved == sorted(moved)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved)
    room = (len(places) - 1) * distance <= 1
    assert not room or all(b - a >= distance - 1e-9 for a, b in itertools.pairwise(moved))


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "0.25"), (20, "20"), (5000, "5,000"), (1e6, "10⁶"), (2e7, "2·10⁷"), (1e-3, "0.001")]
)
def test_numbers_on_axes(value: float, text: str) -> None:
    assert plain_number(value) == text


@pytest.mark.parametrize("draw", [perplexity_by_rate, perplexity_by_bytes])
def test_each_finished_run_is_a_point_and_no_other(draw, runs: list[Run]) -> None:
    text = texts_of(runs)[0]
    (axes,) = draw(runs, text).axes
    points = [line for line in axes.lines if str(line.get_gid()).startswith("point-")]
    expected = {run.name for run in runs if run.finetuned(text) is not None and not run.dense}
    assert len(points) == len(expected) == 6
    assert {str(line.get_label()).rpartition(", ")[2] for line in points} == expected
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_rate_figure_names_the_dense_model_and_the_reference(runs: list[Run]) -> None:
    text = texts_of(runs)[0]
    shown = texts_in(perplexity_by_rate(runs, text, Reference("Q4_1", {text: 33.0})))
    for name in ("dense 30.2", "dense, finetuned 27.2", "Q4_1 33", "waterfill", "3 rows", "Pareto front"):
        assert f">{name}<" in shown


def test_byte_figure_marks_the_dense_model_and_the_reference(runs: list[Run]) -> None:
    text = texts_of(runs)[0]
    shown = texts_in(perplexity_by_bytes(runs, text, Reference("Q4_1", {text: 33.0}, 98_000_000)))
    assert ">dense model, bf16<" in shown
    assert ">Q4_1<" in shown


def test_one_run_makes_a_figure(runs: list[Run]) -> None:
    one = [run for run in runs if run.status == "finished" and not run.dense][:1]
    text = texts_of(one)[0]
    for draw in (perplexity_by_rate, perplexity_by_bytes):
        assert png(draw(one, text)).startswith(b"\x89PNG")
    assert training_curves(one) is not None


def test_training_losses_of_different_objectives_are_kept_apart(runs: list[Run]) -> None:
    mixed = [replace(run, objective="distill") if run.allocation == "waterfill" else run for run in runs]
    figure = training_curves(mixed)
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Training loss, cross entropy", "Training loss, distill", "Validation loss, cross-entropy"]
    counts = [sum(str(line.get_gid()).startswith("curve-") for line in axes.lines) for axes in figure.axes]
    assert counts == [5, 4, 9]  # unfinished runs too


def test_curves_are_over_tokens_where_all_are_known(runs: list[Run]) -> None:
    figure = training_curves(runs)
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "tokens"
    figure = training_curves([replace(runs[0], tokens=None), *runs[1:]])
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "steps"


def test_many_curves_have_a_legend_in_place_of_names(runs: list[Run]) -> None:
    many = [replace(run, name=f"{run.name}-{copy}") for copy in range(2) for run in runs]
    figure = training_curves(many)
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "proportional",
        "waterfill",
        "dense",
        "1 row",
        "3 rows",
    ]
    few = training_curves(runs)
    assert few is not None
    assert not few.legends


def test_a_legend_of_many_entries_has_one_line_for_each_kind(runs: list[Run]) -> None:
    text = texts_of(runs)[0]
    rules = ("proportional", "waterfill", "uniform", "mine")
    drawn = [run for run in runs if run.layers]
    many = [replace(run, allocation=rules[n % 4], rows=n % 3 + 1) for n, run in enumerate(drawn)]
    figure = perplexity_by_rate(many, text)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 8
    assert set(names[::2]) == set(rules)
    assert names[1::2] == ["1 row", "2 rows", "3 rows", "Pareto front"]


def test_reconstructed_blocks_are_drawn_over_depth(runs: list[Run]) -> None:
    assert block_errors(runs) is None
    rows = tuple({"block": n, "stream_error": 0.1 * n, "increment_error": 0.5, "seconds": 1.0} for n in range(3))
    drawn = block_errors([replace(runs[0], blocks=rows), *runs[1:]])
    assert drawn is not None
    assert [list(axes.lines[0].get_ydata()) for axes in drawn.axes] == [[0.0, 0.1, 0.2], [0.5, 0.5, 0.5]]


def test_runs_without_curves_have_no_figure(runs: list[Run]) -> None:
    assert training_curves([replace(run, curves={}) for run in runs]) is None


def test_heat_maps_have_a_strip_for_each_run_with_layers(runs: list[Run]) -> None:
    (figure,) = heat_maps(runs, ERROR)
    strips = [axes for axes in figure.axes if axes.images]
    assert len(strips) == 6
    assert strips[0].images[0].get_array().shape == (6, 30)


def test_many_runs_take_several_figures_with_one_scale(runs: list[Run]) -> None:
    finished = [run for run in runs if run.layers]
    many = [replace(run, name=f"{run.name}-{copy}") for copy in range(3) for run in finished]
    figures = heat_maps(many, ERROR)
    assert len(figures) == -(-len(many) // STRIPS) == 2
    scales = {axes.images[0].get_clim() for figure in figures for axes in figure.axes if axes.images}
    assert len(scales) == 1


def test_grid_orders_projections_and_marks_what_is_missing() -> None:
    layers = [Layer(f"layers.{b}.{p}_proj", b, p, 8, 1.0, 0.5) for b, p in ((0, "down"), (0, "q"), (2, "q"))]
    projections, blocks, values = grid(layers, lambda layer: layer.relative_error)
    assert (projections, blocks) == (["q", "down"], [0, 2])
    assert values[0] == [0.5, 0.5]
    assert values[1][0] == 0.5
    assert values[1][1] != values[1][1]


def test_quantities_that_do_not_vary_have_no_figure(runs: list[Run]) -> None:
    rank = {"facts": {"rank": 8.0}, "drawn": ("rank",)}
    alike = [replace(run, layers=tuple(replace(x, **rank) for x in run.layers)) for run in runs]
    assert [quantity.key for quantity in quantities(alike)] == [ERROR.key]
    uneven = [replace(run, layers=tuple(replace(x, bits_per_weight=x.block + 1.0) for x in run.layers)) for run in runs]
    assert RATE in quantities(uneven)
    ranks = [
        replace(run, layers=tuple(replace(x, facts={"rank": 1.0 + x.block}, drawn=("rank",)) for x in run.layers))
        for run in runs
    ]
    assert "rank" in [quantity.key for quantity in quantities(ranks)]


@pytest.mark.parametrize("name", [NASTY, "_hidden $\\frac{", "日本語 " * 80])
def test_any_name_is_drawn_as_it_is(name: str, runs: list[Run]) -> None:
    text = texts_of(runs)[0]
    named = [replace(run, name=f"{name}{n}", allocation=name, bits_asked=0.5, rows=1) for n, run in enumerate(runs[:3])]
    for figure in (perplexity_by_rate(named, text), training_curves(named), *heat_maps(named, ERROR)):
        assert figure is not None
        drawing = themed(svg(figure, "x"), name)
        assert "<script" not in drawing


def test_drawings_are_reproducible_and_their_ids_their_own(runs: list[Run]) -> None:
    text = texts_of(runs)[0]
    first, second = (svg(perplexity_by_rate(runs, text), "one") for _ in range(2))
    assert first == second
    assert 'id="' in first
    assert first.count('id="') == first.count('id="one-')


def test_themed_drawing_has_no_colour_of_paper_left(runs: list[Run]) -> None:
    drawing = themed(svg(perplexity_by_rate(runs, texts_of(runs)[0]), "one"), "what it shows")
    assert "var(--ink)" in drawing
    assert "var(--waterfill)" in drawing
    assert "#1b1e23" not in drawing
    assert 'aria-label="what it shows"' in drawing
