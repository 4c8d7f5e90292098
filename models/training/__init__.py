"""Training of learned compressors on a frozen backbone: VisionSelector's scorer, Dynamic-Qwen's predictor.

`spec` says what a training is (no torch), `data` reads conversations, `learners` are the modules that are trained,
`trainer` runs them, `export` turns the result into a full checkpoint and back.
"""
