"""Which rules announce a collapse, judged on runs that they were not built on.

The question: from what a run has logged up to step t, will it collapse within the next HORIZON = 1000 steps?

Protocol, written before any signal of the judged part was looked at. Known of that part were which runs collapse, when
and by which rule, which signals were logged how often, and what the report said of them.

Runs         All of GRIDS, ramp, constant, clients and clients_double. Of runs that logged the same losses, as far as
             the shorter goes, only the longest counts. A collapse and its step c are those of find_collapse, with the
             floors of the report; grids without floors have rules 1 and 2 alone.
Building     The learning-rate ramp (table2_small, attention_off, table3_small, controls, rivals, adaptive, ramp) with
             seeds 0 and 1, and the search for a late collapse (late_collapse, constant rates, seed 0).
Judging      Every other run, in four regimes. "ramp, new seeds": those seven grids with seeds 2 to 4. "no decay":
             late_seeds and late_controls. "constant rates": margin, constant and texts. "other programs": clients and
             clients_double, which are other models in other training loops.
Announcement A rule rings at step t when it may use no line after t, its condition holds, and it has not rung in the
             REST = 200 steps before. A ring announces a collapse at c if c − 1000 ≤ t < c. The lead is c − t of the
             first such ring. A collapse counts as announced when its lead is 200 steps or more.
Healthy      All steps of runs without a collapse, the first ones and those of stalled runs too, and those before
             c − 1000 in the others. A ring there is a false alarm. Nothing at or after c counts.
Threshold    Every rule is a number that must exceed a threshold. Of the thresholds with at most one false alarm in
             10 000 healthy steps of the building part, or one in 100 000 for a second table, it gets the one that
             announces most collapses of that part; of several, the highest. No other number of a rule is looked at
             again after building.
Rivals       ZClip's z-score of the gradient norm (arXiv 2504.02507, α = 0.97, with its clipping); the gradient norm
             over its median of 100 steps; the loss over its mean of 100 steps in standard deviations of these; the
             fall of attention's stable rank below its largest value so far and the alignment of the Jacobians (the
             paper's two); the largest attention logit.
Intervals    95 %: exact (Clopper–Pearson) for a share of collapses, bootstrap over runs for leads and false alarms.
Aim          95 % of the judged collapses announced with at most one false alarm in 100 000 healthy steps.
"""
