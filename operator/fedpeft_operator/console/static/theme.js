// Runs before the page is drawn, so that a chosen theme does not flash; without a choice the system's holds.
"use strict";

document.documentElement.dataset.theme = localStorage.getItem("fedpeft-theme") ?? "system";
