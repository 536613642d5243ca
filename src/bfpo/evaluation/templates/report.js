(function () {
  "use strict";
  var samples = Array.prototype.slice.call(document.querySelectorAll(".sample"));
  var place = document.getElementById("filters");
  var kinds = ["all"];
  samples.forEach(function (sample) {
    var kind = sample.getAttribute("data-kind");
    if (kind && kinds.indexOf(kind) < 0) kinds.push(kind);
  });
  if (place && kinds.length > 2) {
    var buttons = kinds.map(function (kind) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = kind;
      button.addEventListener("click", function () { show(kind); });
      place.appendChild(button);
      return button;
    });
    var show = function (kind) {
      buttons.forEach(function (button, number) {
        button.setAttribute("aria-pressed", String(kinds[number] === kind));
      });
      samples.forEach(function (sample) {
        sample.hidden = kind !== "all" && sample.getAttribute("data-kind") !== kind;
      });
    };
    show("all");
  }
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (details) { details.open = true; });
  });
})();
