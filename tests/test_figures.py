import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from analysis.figures import (
    COLORS,
    against,
    edges,
    fig1,
    fig2,
    fig3,
    fig4,
    geometric_mean,
    heatmaps,
    mean_loss,
    overview,
    peaks,
    save,
    strips,
    theorems,
)
from analysis.runs import load_run, load_runs
from analysis.statistics import judged
from config import UserError
from tests.conftest import ROOT
from tests.test_runs import logged_theory, made_up

STEPS = (50, 100, 200)  # at an uneven cadence


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def probes(scale=1.0):
    """What a run of four blocks logs at STEPS; some values are missing or not finite."""
    logged = {}
    for n, step in enumerate(STEPS):
        line = {"srank/early": 9.0 - n, "jacobian/alignment": 0.2 * (n + 1), "jacobian/ill_conditioned": n}
        line |= {
            "jacobian/product": scale * 10.0**n,
            "jacobian/bound": None,
            "jacobian/bound_4_2": [1e-77, 1e-5, 1e-9][n],
        }
        for i in range(4):
            line |= {f"srank/{i}.{role}": scale * (i + 1) * (n + 1) for role in ("W_Q", "W_K", "W_V", "W_O")}
            line |= {f"srank/{i}.W_up": 1e6, f"jacobian/sigma1/{i}": 10.0 ** (n - i)}
            line |= {f"grad_norm/{i}.W_Q": 3.0 * scale, f"grad_norm/{i}.W_up": 4.0 * scale}
        for i in range(3):
            line |= {f"jacobian/alignment/{i}": (i + n) / 4 + 0.01, f"jacobian/ill_conditioned/{i}": float(i < n)}
        logged[step] = line
    del logged[50]["grad_norm/3.W_Q"], logged[50]["grad_norm/3.W_up"]
    logged[100]["grad_norm/3.W_Q"] = None
    logged[200]["jacobian/sigma1/2"] = 0.0  # what W&B makes of a layer's null
    return logged


@pytest.fixture
def arms(tmp_path):
    """AdamW, which collapses at step 150, MSign, and two arms that measured nothing."""
    on = dict(msign_period=100)
    folders = [
        made_up(tmp_path / "adamw", [2.5] * 149 + [None] + [2.5] * 100, probes=probes()),
        made_up(tmp_path / "msign", [2.1] * 1000, probes=probes(10.0), **on),
        made_up(tmp_path / "mlp", [2.6] * 1000, spikes=(700, 800), **on, msign_targets="mlp"),
        made_up(tmp_path / "off", [2.4] * 1000, **on, msign_map="zero"),
    ]
    return judged(map(load_run, folders))


def with_more(arms, *folders):
    return judged([*arms.run, *map(load_run, folders)])


def lines(ax, label):
    """Steps and values of the lines with this label."""
    return [line.get_xydata().T.tolist() for line in ax.lines if line.get_label() == label]


def collapses(ax):
    return [line.get_xdata()[0] for line in ax.lines if line.get_label() == "collapse"]


def test_overview_is_drawn_and_repeatable(arms, tmp_path):
    first = [p.read_bytes() for p in save(overview(arms), tmp_path / "figure")]
    assert [p.read_bytes() for p in save(overview(arms), tmp_path / "figure")] == first
    assert first[0].startswith(b"\x89PNG")
    assert first[1].count(b"<path") > 20
    empty = plt.figure()
    empty.savefig(tmp_path / "empty.svg")
    assert len(first[1]) > 5 * (tmp_path / "empty.svg").stat().st_size


def test_fig1_shows_stable_rank_and_alignment_against_gradient_norm(arms):
    fig = fig1(arms)
    srank, srank_msign, alignment, _, *norms = fig.axes
    assert [ax.get_title() for ax in fig.axes[:2]] == [
        "AdamW, seed 0",
        "MSign (attention), seed 0",
    ]  # not the arms that measured nothing
    assert lines(srank, "stable rank") == [[[50, 100, 200], [9, 8, 7]]]
    assert lines(alignment, "alignment") == [[[50, 100, 200], pytest.approx([0.2, 0.4, 0.6])]]
    assert srank.get_ylabel().startswith("(a) stable rank")
    assert alignment.get_ylabel().startswith("(b) adjacent alignment")
    for ax in norms:
        assert (ax.get_yscale(), ax.get_xlabel()) == ("log", "step")
        (((first, *_), values),) = lines(ax, "gradient norm, largest of 10 steps")
        assert first == 1
        assert set(values) == {1.0}
    assert [ax.get_ylabel() for ax in norms] == ["gradient norm ‖∇‖₂", ""]
    assert [collapses(ax) for ax in (srank, alignment, norms[0], srank_msign)] == [[150], [150], [150], []]


def test_fig1_shades_the_share_of_ill_conditioned_pairs(arms):
    (band,) = fig1(arms[:1]).axes[1].collections
    assert "ill-conditioned" in band.get_label()
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].max() == pytest.approx(2 / 3)  # two of three pairs at step 200
    assert set(np.round(corners[:, 1], 6)) == {0, 0.333333, 0.666667}


def test_beyond_four_runs_the_first_of_each_arm_gets_a_column(arms, tmp_path):
    more = [made_up(tmp_path / f"s{i}", [2.5] * 200, probes=probes(), seed=i) for i in (1, 2, 3)]
    assert [ax.get_title() for ax in fig1(with_more(arms, *more[:2])).axes[:4]] == [
        "AdamW, seed 0", "MSign (attention), seed 0", "AdamW, seed 1", "AdamW, seed 2"]  # fmt: skip
    assert [ax.get_title() for ax in fig1(with_more(arms, *more)).axes[:3]] == [
        "AdamW, seed 0",
        "MSign (attention), seed 0",
        "",
    ]
    twice = made_up(tmp_path / "twice", [2.5] * 200, probes=probes())
    assert [ax.get_title() for ax in fig1(with_more(arms[:2], twice)).axes[:3]] == [
        "adamw",
        "MSign (attention), seed 0",
        "twice",
    ]


def test_fig2_gives_the_bounds_an_axis_and_says_what_lies_below_it(arms):
    norms, norms_msign, bounds, _ = fig2(arms).axes
    assert lines(norms, "product ‖J(L)···J(1)‖₂") == [[[50, 100, 200], [1, 10, 100]]]
    assert lines(norms_msign, "product ‖J(L)···J(1)‖₂") == [[[50, 100, 200], [10, 100, 1000]]]
    assert len(lines(norms, "gradient norm, largest of 10 steps")) == 1
    assert lines(bounds, "Theorem 4.2's bound (aM)ᴸ/a") == [[[50, 100, 200], [1e-77, 1e-5, 1e-9]]]
    assert (norms.get_yscale(), bounds.get_yscale()) == ("log", "log")
    assert norms.get_ylim() == norms_msign.get_ylim()
    assert bounds.get_ylim()[0] == pytest.approx(1e-78)
    ((_, provable),) = lines(bounds, "provable bound")
    assert np.isnan(provable).all()
    assert "provable bound: ▾ below the axis\nat 3 of 3 measurements" in bounds.get_title()
    assert "Theorem" not in bounds.get_title()
    (feet,) = [line for line in bounds.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert feet.get_xdata().tolist() == [50, 100, 200]
    assert collapses(norms) == collapses(bounds) == [150]


def test_fig3_has_a_line_per_run_and_a_colour_per_arm(arms, tmp_path):
    fig = fig3(with_more(arms, made_up(tmp_path / "second", [2.3] * 1000, seed=1, msign_period=100)))
    loss, grad = fig.axes
    curves = [line for line in loss.lines if len(line.get_xdata()) > 1]
    colors = [
        COLORS[arm] for arm in ("AdamW", "MSign (attention)", "MSign (mlp)", "attention off", "MSign (attention)")
    ]
    assert [to_hex(line.get_color()).upper() for line in curves] == colors
    assert [to_hex(line.get_color()).upper() for line in grad.lines] == colors
    assert curves[4].get_ydata()[-1] == pytest.approx(2.3)
    assert grad.lines[2].get_ydata().max() == 50  # the spikes of the MLP arm
    assert [text.get_text() for text in loss.get_legend().get_texts()] == arms.arm.tolist()
    assert (loss.get_ylabel(), grad.get_ylabel(), grad.get_xlabel()) == ("nats per token", "‖∇‖₂", "step")
    assert grad.get_yscale() == "log"
    crosses = [line.get_xdata()[0] for line in loss.lines if line.get_marker() == "x"]
    assert crosses[0] == 150


def test_fig4_has_a_colour_per_period(arms, tmp_path):
    ten = [made_up(tmp_path / f"ten{i}", [2.0] * 300, msign_period=10, seed=i) for i in (0, 1)]
    loss, grad = fig4(with_more(arms, *ten)).axes
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["P = 10, MSign (attention)", "P = 100, MSign (attention)", "P = ∞ (AdamW)"]
    colors = [to_hex(line.get_color()) for line in grad.lines]
    assert len(colors) == 4  # neither the MLP arm nor the one without attention
    assert colors[0] == colors[1]
    assert len(set(colors)) == 3
    brightness = [np.dot(plt.matplotlib.colors.to_rgb(c), (0.3, 0.6, 0.1)) for c in colors[1:]]
    assert brightness == sorted(brightness, reverse=True)  # in order even without colour


def test_heatmaps_show_the_logged_values_where_and_when_they_were_measured(arms):
    fig = heatmaps(arms)
    meshes = [ax.collections[0] for ax in fig.axes[:8]]
    srank, jacobian, alignment, grad = meshes[::2]
    layer, n = np.arange(4)[:, None], np.arange(3)
    np.testing.assert_allclose(srank.get_array(), (layer + 1.0) * (n + 1))
    np.testing.assert_allclose(jacobian.get_array(), np.ma.array(10.0 ** (n - layer), mask=(layer == 2) & (n == 2)))
    assert np.argwhere(jacobian.get_array().mask).tolist() == [[2, 2]]
    np.testing.assert_allclose(alignment.get_array(), (layer[:3] + n) / 4 + 0.01)
    np.testing.assert_allclose(grad.get_array(), np.full((4, 3), 5.0))
    assert grad.get_array().mask.tolist() == [[False] * 3] * 3 + [[True, True, False]]  # missing, not finite
    np.testing.assert_allclose(srank.get_coordinates()[0, :, 0], [25, 75, 150, 250])
    np.testing.assert_allclose(srank.get_coordinates()[:, 0, 1], [-0.5, 0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(alignment.get_coordinates()[:, 0, 1], [0, 1, 2, 3])  # between layers
    assert [ax.get_title() for ax in fig.axes[:2]] == ["AdamW, seed 0", "MSign (attention), seed 0"]
    assert [ax.get_ylabel() for ax in fig.axes[:8]] == ["layer", ""] * 4
    assert [ax.get_xlabel() for ax in fig.axes[6:8]] == ["step"] * 2
    bars = [ax.get_ylabel().split()[0] for ax in fig.axes[8:]]
    assert bars == ["stable", "Jacobian", "alignment", "gradient"]
    assert {mesh.get_cmap().name for mesh in meshes} == {"viridis"}


def test_heatmaps_share_a_colour_scale_set_by_all_but_the_first_block(arms):
    meshes = [ax.collections[0] for ax in heatmaps(arms).axes[:8]]
    for left, right in zip(meshes[::2], meshes[1::2], strict=True):
        assert left.get_clim() == right.get_clim()
    assert meshes[0].get_clim() == pytest.approx((1, 120))
    assert meshes[2].get_clim() == pytest.approx((1e-3, 10))  # block 0 reaches 100
    assert meshes[4].get_clim() == (0, 1)
    assert meshes[6].get_clim() == pytest.approx((5, 50))
    assert [type(mesh.norm).__name__ for mesh in meshes[::2]] == ["LogNorm", "LogNorm", "Normalize", "LogNorm"]


def test_heatmaps_mark_the_collapse_and_dot_ill_conditioned_pairs(arms):
    axes = heatmaps(arms).axes[:8]
    assert [collapses(ax) for ax in axes] == [[150], []] * 4
    dots = {i: ax.collections[1].get_offsets().tolist() for i, ax in enumerate(axes) if len(ax.collections) > 1}
    assert dots == {i: [[100, 0.5], [200, 0.5], [200, 1.5]] for i in (4, 5)}


def test_heatmaps_of_what_is_partly_there(tmp_path):
    few = {
        10: {"jacobian/sigma1/0": 2.0, "jacobian/alignment/0": 0.5},  # a single step, an older run without flags
    }
    fig = heatmaps(judged([load_run(made_up(tmp_path / "r", [2.0] * 20, probes=few))]))
    said = [[text.get_text() for text in ax.texts] for ax in fig.axes[:4]]
    assert said == [["not logged"], [], [], ["not logged"]]
    assert fig.axes[1].collections[0].get_array().tolist() == [[2.0]]
    save(fig, tmp_path / "figure")


def test_figures_repeat_to_the_byte(arms, tmp_path):
    for draw in (fig1, heatmaps):
        first = [path.read_bytes() for path in save(draw(arms), tmp_path / "figure")]
        assert [path.read_bytes() for path in save(draw(arms), tmp_path / "figure")] == first


@pytest.mark.parametrize(
    ("draw", "needs"),
    [
        (fig1, "needs a run that logs srank/early and jacobian/alignment"),
        (fig2, "needs a run that logs jacobian/product"),
        (fig4, "needs runs with at least two different msign_period"),
        (heatmaps, "needs a run that logs srank/<layer> or jacobian/sigma1/<layer> or "),
    ],
)
def test_what_a_figure_lacks_is_said(tmp_path, draw, needs):
    with pytest.raises(UserError, match=needs):
        draw(judged([load_run(made_up(tmp_path / "r", [2.0] * 200))]))


def test_a_mean_loss_needs_a_hundred_steps(tmp_path):
    short = judged(load_run(made_up(tmp_path / f"r{p}", [2.0] * 99, msign_period=p)) for p in (0, 10))
    for draw in (fig3, fig4):
        with pytest.raises(UserError, match="needs a run of at least 100 steps"):
            draw(short)


def test_recorded_runs_are_drawn():
    runs = judged(load_runs(ROOT / "results/ramp"))
    loss, grad = fig3(runs).axes
    assert len(grad.lines) == len(runs) == 12
    crosses = [line for line in loss.lines if line.get_marker() == "x"]
    assert {to_hex(line.get_color()).upper() for line in crosses} == {COLORS["AdamW"], COLORS["MSign (mlp)"]}
    loss, grad = fig4(runs).axes
    assert len(grad.lines) == 6
    assert loss.get_legend().get_texts()[0].get_text() == "P = 100, MSign (attention)"  # whatever the order of the runs
    np.testing.assert_array_equal(fig3(runs).axes[0].lines[0].get_ydata(), mean_loss(runs.run[0])[::5])


def test_edges_lie_halfway():
    assert edges(np.array([10, 20, 40])).tolist() == [5, 15, 30, 50]
    assert edges(np.array([7])).tolist() == [6.5, 7.5]


def test_peaks_keep_every_spike():
    norms = pd.Series([1.0] * 7 + [90.0] + [2.0] * 16 + [np.inf], index=range(1, 26))
    assert peaks(norms).to_dict() == {1: 90.0, 11: 2.0, 21: 2.0}


def test_geometric_mean_leaves_out_what_has_no_logarithm():
    assert geometric_mean(pd.Series([2.0, 8.0, 0.0, np.nan])) == pytest.approx(4.0)
    assert np.isnan(geometric_mean(pd.Series([0.0, np.nan])))


def test_theorems_show_both_sides_of_the_last_measurement(tmp_path):
    sides = logged_theory()
    run = load_run(made_up(tmp_path / "r", [2.0] * 120, probes={50: dict.fromkeys(sides, 7.0), 100: sides}))
    fig = theorems(run)
    attention, mlp, gradients, ranks = fig.axes
    for ax, labels in (
        (attention, {"upper bound": "4.5/bound", "measured": "4.5/measured"}),
        (mlp, {"upper bound": "4.6/bound", "measured": "4.6/measured"}),
        (gradients, {"lower bound": "4.8/log10_bound", "measured": "4.8/log10_measured"}),
        (ranks, {"hidden states H": "4.10/srank_hidden", "co-hidden states ∂L/∂Y": "4.10/srank_cohidden"}),
    ):
        drawn = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
        assert drawn.keys() == labels.keys()
        for label, name in labels.items():
            np.testing.assert_array_equal(drawn[label], [sides[f"theory/{name}/{i}"] for i in range(3)])
        assert ax.get_ylabel()
    assert "step 100" in fig.get_suptitle()
    with pytest.raises(UserError, match="theory_every"):
        theorems(load_run(made_up(tmp_path / "none", [2.0] * 120)))


def test_strips_tell_collapsed_runs_from_the_others(arms):
    (ax,) = strips(arms.assign(panel="")).axes
    points = {line.get_marker(): line.get_xydata() for line in ax.lines if line.get_linestyle() == "None"}
    np.testing.assert_allclose(points["o"], [[2.1, 1], [2.4, 3]])
    np.testing.assert_allclose(points["x"], [[2.5, 0], [2.6, 2]])
    assert [label.get_text() for label in ax.get_yticklabels()] == arms.arm.tolist()
    (floor,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert floor.get_xdata()[0] == pytest.approx(2.4)


def test_losses_are_drawn_against_a_value_of_the_configuration(tmp_path):
    """Two rates, two seeds. A run that ends above its start is drawn at its start; the line goes through the means."""
    runs = [
        load_run(made_up(tmp_path / f"{rate}-{seed}", [4.0, *start, *[end + seed] * 400], lr_scale=rate, seed=seed))
        for rate, start, end in ((1.0, [], 2.0), (8.0, [3.0] * 300, 5.0))
        for seed in range(2)
    ]
    frame = judged(runs).assign(panel="", line="AdamW", arm=lambda frame: frame.lr_scale)
    (ax,) = against(frame, "lr_scale", "capped_loss", xscale="log", xlabel="rate").axes
    line, *dots = ax.lines
    drawn = {dot.get_marker(): dot.get_xydata().tolist() for dot in dots}
    assert drawn == {"o": [[1.0, 2.0], [1.0, 3.0]], "x": [[8.0, 4.0], [8.0, 4.0]]}
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1.0, 8.0], [2.5, 4.0])
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "rate" and ax.get_legend() is None


def test_one_value_against_another_a_column_per_panel(arms):
    a = arms.assign(panel="a", line=["AdamW", "mine", "mine", "mine"])
    frame = pd.concat([a, arms.assign(panel="b", line="AdamW")])
    left, right = against(frame, "seed", "loss", xlabel="one", ylabel="other").axes
    named = [line.get_label() for line in left.lines if not line.get_label().startswith("_")]
    assert named == ["AdamW", "mine"] and left.get_title() == "a"
    drawn = [y for line in left.lines if line.get_linestyle() == "None" for y in line.get_ydata()]
    assert sorted(drawn) == sorted(arms.loss)
    assert (right.get_xlabel(), right.get_ylabel()) == ("one", "other")
