(function () {
  "use strict";
  var PAGE = 12;
  var block = document.getElementById("answer-data");
  var place = document.getElementById("answers");
  var status = document.getElementById("answer-status");
  var controls = document.getElementById("answer-controls");

  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not(.folded)").forEach(function (details) { details.open = true; });
  });
  if (!block || !place) return;
  if (typeof DecompressionStream === "undefined") {
    status.textContent = "This browser cannot unpack the answers of this page; they are in the JSON file beside it.";
    return;
  }

  // Text is always set as text, so that the output of models is never parsed as HTML.
  function make(tag, name, text) {
    var element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function bytes(text) {
    var raw = atob(text.trim());
    var array = new Uint8Array(raw.length);
    for (var i = 0; i < raw.length; i++) array[i] = raw.charCodeAt(i);
    return array;
  }

  var stream = new Blob([bytes(block.textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
  new Response(stream).json().then(start, function () {
    status.textContent = "The answers of this page could not be unpacked; they are in the JSON file beside it.";
  });

  function start(data) {
    var shown = data.rows, at = 0;
    var haystacks = data.rows.map(function (row) {
      return (row[0] + "\n" + row[3].map(function (answer) { return answer[1]; }).join("\n")).toLowerCase();
    });
    var fields = {};

    function values(column) {
      var seen = [];
      data.rows.forEach(function (row) { if (row[column] && seen.indexOf(row[column]) < 0) seen.push(row[column]); });
      return seen;
    }

    function choice(name, label, options) {
      if (options.length < 2 && name !== "verdict") return;
      var box = make("label", "", label);
      var select = make("select");
      select.id = "filter-" + name;
      [["", "all"]].concat(options).forEach(function (option) {
        var item = make("option", "", option[1]);
        item.value = option[0];
        select.appendChild(item);
      });
      select.addEventListener("change", filter);
      box.appendChild(select);
      controls.appendChild(box);
      fields[name] = select;
    }

    function pairs(list) { return list.map(function (item) { return [item, item]; }); }
    choice("suite", "Suite", pairs(values(2)));
    choice("kind", "Kind of prompt", pairs(values(1)));
    var words = [];
    data.badges.forEach(function (set) {
      set.forEach(function (badge) {
        if (words.indexOf(badge[0]) < 0 && badge[0].indexOf("helpfulness") !== 0) words.push(badge[0]);
      });
    });
    choice("verdict", "Verdict", pairs(words));
    choice("method", "of the model", data.methods.map(function (method, number) { return [String(number), method[0]]; }));
    var box = make("label", "search", "Search");
    var search = make("input");
    search.type = "search";
    search.id = "filter-search";
    search.autocomplete = "off";
    var waiting = 0;
    search.addEventListener("input", function () { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
    box.appendChild(search);
    controls.appendChild(box);

    function chosen(name) { return fields[name] ? fields[name].value : ""; }

    function filter() {
      var suite = chosen("suite"), kind = chosen("kind"), verdict = chosen("verdict"), method = chosen("method");
      var text = search.value.trim().toLowerCase();
      shown = data.rows.filter(function (row, number) {
        if (suite && row[2] !== suite) return false;
        if (kind && row[1] !== kind) return false;
        if (text && haystacks[number].indexOf(text) < 0) return false;
        if (!verdict && !method) return true;
        return row[3].some(function (answer) {
          if (method && String(answer[0]) !== method) return false;
          return !verdict || data.badges[answer[2]].some(function (badge) { return badge[0] === verdict; });
        });
      });
      at = 0;
      draw();
    }

    function body(answer) {
      var holder = document.createDocumentFragment();
      var text = make("p", "text", answer[1]);
      text.dir = "auto";
      text.tabIndex = 0;
      if (!answer[1]) { text = make("p", "text none", answer[5] ? "(no answer behind the thoughts)" : "(nothing written)"); }
      holder.appendChild(text);
      if (answer[4]) holder.appendChild(make("p", "cut", "cut on this page: " + answer[4] + " more characters"));
      if (answer[5]) holder.appendChild(thoughts(answer));
      return holder;
    }

    // Thoughts may be harmful where the answer is not: their text too is added on a click.
    function thoughts(answer) {
      var details = make("details", "folded");
      details.appendChild(make("summary", "", "Show the thoughts before this answer, which were not judged"));
      details.addEventListener("toggle", function () {
        if (!details.open || details.childNodes.length > 1) return;
        var text = make("p", "text", answer[5]);
        text.dir = "auto";
        text.tabIndex = 0;
        details.appendChild(text);
        if (answer[6]) details.appendChild(make("p", "cut", "cut on this page: " + answer[6] + " more characters"));
      });
      return details;
    }

    function card(answer) {
      var method = data.methods[answer[0]];
      var element = make("div", "answer");
      element.style.setProperty("--own", "var(--" + method[1] + ")");
      element.appendChild(make("h4", "who", method[0]));
      if (answer[3]) {
        // The text is added on a click, so that neither a search in the browser nor a print shows it before.
        var details = make("details", "folded");
        details.appendChild(make("summary", "", "Show an answer that may be harmful"));
        details.addEventListener("toggle", function () {
          if (details.open && details.childNodes.length === 1) details.appendChild(body(answer));
        });
        element.appendChild(details);
      } else {
        element.appendChild(body(answer));
      }
      var list = make("div", "badges");
      data.badges[answer[2]].forEach(function (badge) {
        list.appendChild(make("span", "badge " + badge[1], badge[0]));
      });
      element.appendChild(list);
      return element;
    }

    function draw() {
      place.textContent = "";
      shown.slice(at, at + PAGE).forEach(function (row) {
        var article = make("article", "sample");
        var prompt = make("h3", "prompt", row[0]);
        prompt.dir = "auto";
        [row[1], row[2]].forEach(function (word) { if (word) prompt.appendChild(make("span", "badge plain", word)); });
        article.appendChild(prompt);
        var answers = make("div", "answers");
        row[3].forEach(function (answer) { answers.appendChild(card(answer)); });
        article.appendChild(answers);
        place.appendChild(article);
      });
      var last = Math.min(at + PAGE, shown.length);
      status.textContent = shown.length
        ? "Prompts " + (at + 1) + " to " + last + " of " + shown.length + (shown.length < data.rows.length ? " found, " + data.rows.length + " in all" : "")
        : "No prompt matches; " + data.rows.length + " in all";
      back.disabled = at === 0;
      next.disabled = last >= shown.length;
    }

    var pager = document.getElementById("answer-pager");
    function button(text, step) {
      var element = make("button", "", text);
      element.type = "button";
      element.addEventListener("click", function () {
        at += step;
        draw();
        document.getElementById("samples").scrollIntoView();
        status.focus();
      });
      pager.appendChild(element);
      return element;
    }
    var back = button("Previous", -PAGE), next = button("Next", PAGE);
    draw();
    place.setAttribute("data-ready", "true");
  }
})();
