"""Figures and the HTML report, from run folders alone: no model, no data, no device.

loading -> comparison, fairness -> evidence: figures as data (panels)
                               -> figures (matplotlib, for papers), charts (plotly, for the page), tables -> page
"""
