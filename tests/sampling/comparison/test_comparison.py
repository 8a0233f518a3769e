"""A comparison of samplers: its cells cost what they may, and what is said of its points is what was measured."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.model.config import ObjectiveConfig
from ditmoe.sampling.comparison.cells import (
    PLAIN,
    ChainVariant,
    ComparisonConfig,
    cells_of,
    cost,
    longest,
    longest_with_share,
)
from ditmoe.sampling.comparison.results import curves_of, markdown, mean_row
from ditmoe.sampling.comparison.verdicts import BEST, Point, between, frontier, judge, verdicts
from ditmoe.sampling.integrators.samplers import SAMPLERS
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import CHAIN_PREFIX

FLOW = ObjectiveConfig()
PLANNED = tuple(name for name in SAMPLERS if name not in ("kar1", "rk45"))

samplers = st.builds(
    lambda name, corrections, tweedie: SamplerConfig(
        sampler=name,
        corrector_steps=corrections if name in ("reverse-diffusion", "euler-maruyama") else 0,
        tweedie=tweedie,
    ).resolved(FLOW),
    st.sampled_from(PLANNED),
    st.integers(0, 3),
    st.booleans(),
)
variants = st.builds(
    lambda **values: ChainVariant(**{key: value for key, value in values.items() if value is not None}),
    skip=st.integers(1, 30),
    thin=st.integers(1, 3),
    samples_per_chain=st.integers(1, 100),
    restart_every=st.none() | st.integers(1, 60),
)
shares = st.builds(
    ChainVariant,
    share=st.floats(0.01, 0.99),
    thin=st.integers(1, 3),
    samples_per_chain=st.integers(1, 100),
    step_rule=st.sampled_from(("constant", "proportional")),
)


def chained(config, variant):
    return config.model_copy(update={"sampler": f"{CHAIN_PREFIX}{config.sampler}", "dlg": variant.chains()})


def one_step_more(config):
    return config.model_copy(update={"steps": config.steps + 1})


def longest_is_right(config, nfe):
    best = longest(config, nfe)
    if best is None:
        assert cost(config.model_copy(update={"steps": 1})) > nfe
    else:
        assert cost(best) <= nfe < cost(one_step_more(best))
        assert best.model_copy(update={"steps": config.steps}) == config
    return best


@given(samplers, st.integers(1, 300))
def test_steps_cost_no_more_than_the_target_and_one_more_would(config, nfe):
    longest_is_right(config, nfe)


@given(samplers, variants, st.integers(1, 300))
def test_chains_leave_the_rest_of_the_target_to_finishing(config, variant, nfe):
    longest_is_right(chained(config, variant), nfe)


@given(samplers, shares, st.integers(1, 300))
def test_a_share_of_what_the_start_leaves_goes_into_the_chain(config, variant, nfe):
    with_chains = chained(config, variant)
    best = longest_with_share(with_chains, variant, nfe)
    if best is None:
        return
    assert cost(best) <= nfe < cost(one_step_more(best))
    walking = best.dlg.skip * best.dlg.thin
    start = cost(best) - walking - cost(best.model_copy(update={"sampler": config.sampler}))
    wanted = variant.share * (nfe - start)
    assert best.dlg.skip == 1 or walking <= wanted + 1e-6
    assert walking + variant.thin > wanted - 1e-6


def test_cells_are_those_that_are_possible_and_each_comes_once():
    comparison = ComparisonConfig(
        nfe=(2, 5, 6, 7, 30),
        tolerances=(0.01, 0.1),
        samplers=("kar1", {"sampler": "kar2", "churn": 20}, "rk45"),
        chains={"published": {"skip": 5}, "half": {"share": 0.5}},
        seed=3,
        cfg_scale=1.5,
        schedule="own",
    )
    cells, left_out = cells_of(comparison, FLOW)
    table = [(cell.sampler, cell.variant, cell.targets, cell.config.steps) for cell in cells]
    # Heun takes 2·steps − 1; a chain's start is 37 + 20 evaluations for 50 samples, 1.14 each; Tweedie's step 1.
    assert table[:8] == [
        ("kar1", "plain", (2,), 1),
        ("kar1", "plain", (5, 6), 3),
        ("kar1", "plain", (7,), 4),
        ("kar1", "plain", (30,), 15),
        ("kar1", "published", (30,), 11),
        ("kar1", "half", (5, 6), 1),
        ("kar1", "half", (7,), 1),
        ("kar1", "half", (30,), 7),
    ]
    assert [cell.config.dlg.skip for cell in cells[4:8]] == [5, 1, 2, 13]
    assert "kar1, published, NFE 6: one step costs more" in left_out
    assert "kar1, half, NFE 2: one step costs more" in left_out
    assert "rk45, half: its NFE is not known beforehand, to take a share of" in left_out
    assert {cell.sampler for cell in cells} == {"kar1", "kar2 (churn 20)", "rk45"}
    assert {(cell.config.cfg_scale, cell.config.schedule, cell.config.seed) for cell in cells} == {(1.5, "own", 3)}
    rk45 = [(cell.variant, cell.targets, cell.config.tolerance) for cell in cells if cell.sampler == "rk45"]
    assert rk45 == [(name, (value,), value) for name in ("plain", "published") for value in (0.01, 0.1)]
    assert len({(cell.sampler, cell.variant, cell.config.model_dump_json()) for cell in cells}) == len(cells)
    only_chains = ComparisonConfig(nfe=(30,), samplers=("euler",), chains={"a": {}}, plain=False)
    assert [cell.variant for cell in cells_of(only_chains, FLOW)[0]] == ["a"]


def seed_row(seed, fid, recall=0.5, sampler="euler", variant=PLAIN, nfe=10.0):
    figures = {"fid": fid, "recall": recall, "precision": 0.25, "fid_error": 0.0, "fid_floor": 0.1}
    figures |= {"recognised": None, "chains": None, "independent": None, "seconds": 2.0, "evaluation": f"e{seed}"}
    place = {"sampler": sampler, "variant": variant, "targets": [10], "steps": 10, "tolerance": None, "nfe": nfe}
    return {**place, "settings": {"seed": seed}, **figures}


def test_figures_of_seeds_are_means_with_their_deviation():
    one = seed_row(4, 1.0)
    assert mean_row([one]) is one
    mean = mean_row([seed_row(4, 1.0, 0.4), seed_row(5, 2.0, 0.5), seed_row(6, 6.0, None)])
    assert (mean["fid"], mean["deviations"]["fid"]) == (3.0, pytest.approx(math.sqrt(7)))
    assert mean["recall"] is None and mean["deviations"]["recall"] is None  # one seed has none
    assert mean["deviations"]["precision"] == 0.0 and mean["recognised"] is None
    assert [(seed["seed"], seed["fid"], seed["evaluation"]) for seed in mean["seeds"]] == [
        (4, 1.0, "e4"),
        (5, 2.0, "e5"),
        (6, 6.0, "e6"),
    ]
    (point,) = curves_of([mean])["euler"][PLAIN]
    assert (point.fid, point.error) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert "3 ± 2.6" in markdown("title", [mean], [], [])
    warning = "class 9 is <img src=x> [a](http://b) `c` _d_ a|b &lt;\n# e in my_folder/x_1 and ten"
    page = markdown("t_1 *x*", [mean], [warning], [warning])
    shown = r"- class 9 is \<img src=x\> \[a\](http://b) \`c\` \_d\_ a\|b \&lt;\\n\# e in my_folder/x_1 and ten"
    assert page.splitlines()[0] == r"# t_1 \*x\*" and page.splitlines().count(shown) == 2


@pytest.mark.parametrize(("chains", "wins"), [((1.0, 1.2, 1.1), True), ((0.2, 3.0, 1.5), False)])
def test_a_win_over_seeds_is_more_than_their_spread(chains, wins):
    """Both have the smaller mean; the second by less than seeds lie apart."""
    alone = mean_row([seed_row(seed, fid) for seed, fid in enumerate((1.9, 2.0, 2.1))])
    with_chains = mean_row([seed_row(seed, fid, variant="a") for seed, fid in enumerate(chains)])
    verdict = verdicts(curves_of([alone, with_chains]), PLAIN)[0]
    assert with_chains["fid"] < alone["fid"] and bool(verdict.equal.won) == wins


def test_seeds_of_a_comparison():
    assert list(ComparisonConfig(nfe=(1,), samplers=("euler",), seed=5, repeats=3).seeds) == [5, 6, 7]


def power_law(factor, power, at):
    return [Point(n, factor * n**power, 0.5) for n in at]


def test_a_power_law_is_interpolated_exactly_and_never_extrapolated():
    curve = power_law(100, -1.3, (4, 7, 50))
    for nfe in (4, 5.5, 7, 20, 50):
        assert math.isclose(between(curve, nfe).fid, 100 * nfe**-1.3)
    assert between(curve, 3.99) is None and between(curve, 50.01) is None
    assert between([Point(1, 2, 0.2), Point(4, 2, 0.6)], 2).recall == pytest.approx(0.4)
    assert between([Point(1, 2, None), Point(4, 2, 0.6)], 2).recall is None
    assert between([Point(3, 5), Point(3, 4)], 3).fid == 4  # the better of two at one NFE
    # Beside a precise point the error is that point's, however wide the far one's; in between both count.
    wide = [Point(10, 40, error=2.0), Point(20, 3, error=0.03)]
    assert between(wide, 19.99).error == pytest.approx(0.03, rel=0.01)
    assert between(wide, 10.01).error == pytest.approx(2.0, rel=0.01)
    assert between([Point(1, 4, error=0.4), Point(4, 4, error=0.4)], 2).error == pytest.approx(0.4 / math.sqrt(2))
    assert between([Point(1, 0, error=0.0), Point(4, 4, error=0.4)], 2).error == 0


def test_stretches_end_where_the_curves_cross():
    # 60·n^−1 and 200·n^−2 cross at n = 200/60 ≈ 3.3; against 60·(2n)^−1 at n ≈ 6.7.
    alone = power_law(60, -1, (2, 4, 8, 16, 32))
    chains = power_law(200, -2, (1, 2, 3, 4, 5, 6, 7, 12, 20, 40))
    equal, twice = judge(chains, alone, 1), judge(chains, alone, 2)
    assert [(s.chains[0].nfe, s.chains[-1].nfe) for s in equal.won] == [(4, 20)]
    assert (equal.lost, equal.unjudged) == ((2, 3), (1, 40))
    assert [(s.chains[0].nfe, s.chains[-1].nfe) for s in twice.won] == [(7, 12)]
    assert (twice.lost, twice.unjudged) == ((1, 2, 3, 4, 5, 6), (20, 40))
    assert [point.nfe for point in twice.won[0].alone] == [14, 24]
    # A point that does not win parts a stretch, and a draw does not win.
    bump = [Point(4, 1), Point(8, alone[2].fid), Point(16, 1)]
    assert [len(s.chains) for s in judge(bump, alone, 1).won] == [1, 1]


def test_the_best_of_the_chains_are_those_that_nothing_beats():
    one, other = power_law(30, -1, (4, 8, 16)), power_law(200, -2, (4, 8, 16))
    assert frontier(one + other) == [one[0], other[1], other[2]]
    curves = {"kar2": {PLAIN: power_law(28, -1, (4, 8, 16)), "one": one, "other": other}, "euler": {"one": one}}
    found = {verdict.variant: verdict for verdict in verdicts(curves, PLAIN)}
    assert list(found) == ["one", "other", BEST]  # nothing is said of euler, which was not measured alone
    assert found["one"].equal.won == ()
    assert [point.nfe for point in found[BEST].equal.won[0].chains] == [8, 16]


def row(sampler, variant, nfe, fid, recall):
    return {
        "sampler": sampler,
        "variant": variant,
        "targets": [nfe],
        "steps": 3,
        "tolerance": None,
        "nfe": nfe,
        "fid": fid,
        "fid_floor": 0.5,
        "precision": 0.7,
        "recall": recall,
        "recognised": None,
        "seconds": None,
        "chains": None,
    }


def test_the_tables_say_where_and_leave_nothing_out():
    rows = [row("kar2", PLAIN, n, 60 / n, 0.6) for n in (2, 4, 8, 16, 32)]
    rows += [row("kar2", "published", n, 200 / n**2, 0.5) for n in (1, 3, 4, 8, 40)]
    rows.append(row("kar2", "published", 9, None, None))
    page = markdown("digits", rows, ["heun, published, NFE 6: one step costs more"], ["few images"])
    assert "at NFE 4–8, recall 0.5–0.5 against 0.6–0.6; not at 3; not judged at 1, 40" in page
    assert "at NFE 8, recall 0.5 against 0.6; not at 1, 3, 4; not judged at 40" in page
    table = page[page.index("## Every evaluation") :]
    assert sum(line.startswith("| kar2") for line in table.splitlines()) == len(rows)
    assert "- heun, published, NFE 6: one step costs more" in page and "- few images" in page
    assert [point.nfe for point in curves_of(rows)["kar2"]["published"]] == [1, 3, 4, 8, 40]
