import numpy as np

import observations
from networks import construct_network
from observations import NormalizedValues

SETTINGS = {"baseline": (1.0, "dataset"), "proposed": (0.1, "bn"), "init": (0.1, "bn")}  # bn_weight and input_norm


def test_learned_scales_and_shifts():
    weights = {name: construct_network(bn_weight=w, input_norm=n).state_dict() for name, (w, n) in SETTINGS.items()}
    weights["proposed"]["1.bn1.weight"][:16] *= 1.2  # a quarter of the channels of the first batch norm of the network
    weights["proposed"]["1.layer4.1.bn2.bias"] += 0.05
    figure = observations.learned_scales_and_shifts(weights, {name: w for name, (w, _) in SETTINGS.items()})
    scales, shifts = figure.axes
    for panel, start in ((scales, 1), (shifts, 0)):
        medians = [line for line in panel.lines if line.get_marker() != "None"]
        assert [line.get_label() for line in medians] == list(SETTINGS)
        assert len({line.get_marker() for line in medians}) == 3  # what can be told apart in grey
        assert [np.round(line.get_xdata()).tolist() for line in medians] == [
            list(range(1, 21)),
            list(range(21)),
            list(range(21)),
        ]
        places = np.concatenate([line.get_xdata() for line in medians])
        assert len(np.unique(places.round(6))) == 62  # no two above each other
        np.testing.assert_allclose(medians[0].get_ydata(), start, rtol=1e-6)
        np.testing.assert_allclose(medians[2].get_ydata(), start, rtol=1e-6)
    whole, most = (np.array(bars.get_segments())[:, :, 1] for bars in scales.collections[2:4])
    np.testing.assert_allclose(whole[1], [1, 1.2], rtol=1e-6)
    np.testing.assert_allclose(most[1], [1, 1.2], rtol=1e-6)
    np.testing.assert_allclose(np.delete(whole, 1, axis=0), 1, rtol=1e-6)
    shift = next(line for line in shifts.lines if line.get_label() == "proposed").get_ydata()
    np.testing.assert_allclose(shift[[0, 19, 20]], [0, 0, 0.5], atol=1e-6)  # 0.05 / 0.1


def test_normalized_values():
    measured = {
        "baseline": [NormalizedValues("bn1", 0.02, 9.0), NormalizedValues("bn2", 0.01, 8.0)],
        "proposed": [NormalizedValues("0", 0.001, 2.0), NormalizedValues("1.bn1", 0.002, 4.0)],
    }
    share, largest = observations.normalized_values(measured).axes
    np.testing.assert_allclose(share.lines[0].get_xydata(), [[1, 2], [2, 1]])
    np.testing.assert_allclose(share.lines[1].get_xydata(), [[0, 0.1], [1, 0.2]])
    np.testing.assert_allclose(largest.lines[1].get_xydata(), [[0, 2], [1, 4]])
