import shlex

import pytest

import run_settings
from command_line.flag_types import FlagError
from experiment.plan import PlannedRun, command_of, parse, plan_runs

FLAGS = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "2"]
EXPERIMENT = "digits-resnet18-batch_size=48-num_epochs=2"


def planned(*flags: str) -> list[PlannedRun]:
    return parse([*FLAGS, *flags]).runs


def test_order_is_seed_by_seed():
    assert [(run.method, run.settings.seed) for run in planned("--seeds", "1-2", "7")] == [
        (method, seed) for seed in (1, 2, 7) for method in ("baseline", "proposed")
    ]
    assert len(planned()) == 30


def test_methods_of_the_paper():
    found = {
        run.method: (run.settings.bn_weight, run.settings.c, run.settings.input_norm)
        for run in planned("--settings", "baseline", "proposed", "init", "rate", "input", "--seeds", "1")
    }
    assert found == {
        "baseline": (1, 1, "dataset"),
        "proposed": (0.1, 100, "bn"),
        "init": (0.1, 1, "bn"),
        "rate": (1, 100, "bn"),
        "input": (1, 1, "bn"),
    }


def test_own_methods_and_sweep():
    found = planned("--settings", "proposed", "half:bn_weight=0.5,c=50", "--bn_weights", "0.01", "0.1", "--seeds", "3")
    assert [(run.method, run.settings.bn_weight, run.settings.c, run.settings.input_norm) for run in found] == [
        ("proposed", 0.1, 100, "bn"),
        ("half", 0.5, 50, "bn"),
        ("bn_weight 0.01", 0.01, 100, "bn"),  # 0.1 is there already, as proposed
    ]


def test_names_of_runs_are_those_of_train():
    for run in planned("--precision", "bfloat16", "--seeds", "1"):
        assert run.settings.run_name == run_settings.parse(run.flags).run_name
    assert (
        parse([*FLAGS, "--precision", "bfloat16"]).table_name
        == "digits-resnet18-batch_size=48-num_epochs=2-precision=bfloat16"
    )
    named = planned("--name", "mine", "--seeds", "1")
    assert [run.settings.run_name for run in named] == ["mine-weight1-c1-dataset-seed1", "mine-weight0.1-c100-bn-seed1"]


def test_cluster():
    """No command is of one, unlike --scheduler, the schedule of train.py."""
    flags = ["--cluster", "tcp://[::1]:86", "--scheduler", "none"]
    args = parse([*FLAGS, *flags])
    assert args.cluster == "tcp://[::1]:86" and parse(FLAGS).cluster is None
    assert {run.settings.scheduler for run in args.runs} == {"none"}
    assert "tcp" not in shlex.join(args.runs[0].flags)
    command = command_of(["--seeds", "1", *flags, "--jobs=1", "--restart"])
    assert command == "python reproduce.py --seeds 1 --scheduler none"


# --- learning rates to choose from ----------------------------------------------------------------------------------


def test_tuning_runs_are_every_method_at_each_rate():
    args = parse([*FLAGS, "--learning_rates", "0.1", "0.02", "--tuning_seeds", "27-28"])
    assert [(run.settings.seed, run.settings.learning_rate, run.method) for run in args.tuning_runs] == [
        (seed, rate, name) for seed in (27, 28) for rate in (0.02, 0.1) for name in ("baseline", "proposed")
    ]
    assert args.runs == [] and all(run.for_tuning for run in args.tuning_runs)
    assert parse([*FLAGS, "--learning_rates", "0.1", "0.02"]).tuning_seeds == [16, 17, 18, 19, 20]
    assert parse(FLAGS).tuning_runs == []


def test_runs_at_chosen_rates_come_in_pairs():
    args = parse([*FLAGS, "--learning_rates", "0.1", "0.02", "--seeds", "1-2"])
    runs = plan_runs(args, {"baseline": 0.1, "proposed": 0.02})
    expected = [(1, "baseline", 0.1), (1, "proposed", 0.02), (2, "baseline", 0.1), (2, "proposed", 0.02)]
    assert [(run.settings.seed, run.method, run.settings.learning_rate) for run in runs] == expected
    assert not any(run.for_tuning for run in runs)
    # the runs at the default rate are those of the plain experiment
    assert (
        runs[0].settings.run_name
        == planned("--seeds", "1")[0].settings.run_name
        == f"{EXPERIMENT}-weight1-c1-dataset-seed1"
    )
    assert runs[1].settings.run_name == f"{EXPERIMENT}-learning_rate=0.02-weight0.1-c100-bn-seed1"
    for run in (*args.tuning_runs, *runs):
        assert run.settings.run_name == run_settings.parse(run.flags).run_name


def test_names_of_runs_at_rates_with_a_name():
    args = parse([*FLAGS, "--learning_rates", "0.1", "0.02", "--name", "mine", "--tuning_seeds", "29"])
    assert [run.settings.run_name for run in args.tuning_runs[1:3]] == [
        "mine-learning_rate=0.02-weight0.1-c100-bn-seed29",
        "mine-weight1-c1-dataset-seed29",
    ]
    assert args.table_name == "mine-learning_rates=0.02+0.1"
    at_default = plan_runs(args, {"baseline": 0.1, "proposed": 0.1})
    assert [run.settings.run_name for run in at_default] == [run.settings.run_name for run in planned("--name", "mine")]


def test_every_table_has_a_name_of_its_own():
    rates, last = ["--learning_rates", "0.1", "0.02"], ["--select", "last"]
    names = [parse([*FLAGS, *flags]).table_name for flags in ([], last, rates, [*rates, *last])]
    tuned = f"{EXPERIMENT}-learning_rates=0.02+0.1"
    assert names == [EXPERIMENT, f"{EXPERIMENT}-last", tuned, f"{tuned}-last"]


def test_what_all_runs_of_a_table_share():
    shared = parse([*FLAGS, "--momentum", "0.5"]).shared
    assert (shared["learning_rate"], shared["momentum"]) == (0.1, 0.5)
    assert not shared.keys() & {"bn_weight", "c", "input_norm", "seed", "select"}
    tuned = parse([*FLAGS, "--learning_rates", "0.1", "0.02", "--tuning_seeds", "29", "28", "--select", "last"]).shared
    assert "learning_rate" not in tuned
    assert (tuned["learning_rates"], tuned["tuning_seeds"], tuned["select"]) == ("0.02+0.1", "28 29", "last")


def test_contrast_that_is_given_twice_is_made_once():
    assert parse([*FLAGS, *["--contrast", "baseline", "proposed"] * 2]).contrast == [("baseline", "proposed")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contrast", "init", "proposed"], "'init' is none of baseline, proposed: see --settings"),
        (["--contrast", "baseline", "baseline"], "baseline and baseline: there is nothing to compare"),
        (["--contrast", "proposed", "baseline"], "proposed and baseline: every setting is compared with it anyway"),
        (["--select", "first"], "argument --select: invalid choice: 'first'"),
        (["--learning_rates", "0"], "argument --learning_rates: must be a number from 1e-30"),
        (["--learning_rates", "0.1", "--learning_rate=0.2"], "--learning_rates has the rates: leave it out"),
        (["--learning_rates", "0.1", "--seeds", "1-17"], "argument --tuning_seeds: 16, 17 must not be among --seeds"),
        (["--tuning_seeds", "16"], "nothing to choose without --learning_rates"),
        (["--learning_rates", *(f"0.1{n:08}" for n in range(1, 20))], "argument --name: the name of the table"),
    ],
)
def test_wrong_flag(flags, message):
    with pytest.raises(FlagError) as error:
        parse([*FLAGS, *flags])
    assert message in str(error.value)
