"""Figures and the HTML report, from run folders alone: no model, no data, no device.

study_plan, model_diagnosis -> loading        what the folders hold
loading -> groups -> comparison, fairness     which runs are compared, by how much they differ, and whether it is fair
curves, studies, layers -> evidence           the figures, as data (panels)
comparison, evidence -> analysis              all that a report says
figures (matplotlib, for papers), charts (plotly, for the page), tables -> page
"""
