//! A model of a type of its own: tells the language of a text by its trigrams of letters. The broker queues, times and
//! bounds what it is asked, and needs to know nothing of it.
//!
//! `modelbroker serve --provider "custom/language=target/debug/examples/provide_language"` keeps it running;
//! without that, `cargo run -p worker-sdk --example provide_language` provides it for as long as it runs. Callers:
//! `client.model("custom/language")?.call(text.as_bytes(), &CallOptions::default())`.
//!
//! In: UTF-8. Out: up to three lines `language TAB share TAB letters`, the likeliest first.

use std::collections::HashMap;
use worker_sdk::{Client, ProviderError, ProviderSpec, SdkError};

/// The first articles of the Universal Declaration of Human Rights: enough to tell these languages apart.
const SAMPLES: [(&str, &str); 7] = [
    (
        "en",
        "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should act towards one another in a spirit of brotherhood. Everyone is entitled to all the rights and freedoms set forth in this Declaration, without distinction of any kind, such as race, colour, sex, language, religion, political or other opinion, national or social origin, property, birth or other status. Everyone has the right to life, liberty and security of person. No one shall be held in slavery or servitude.",
    ),
    (
        "de",
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen. Jeder hat Anspruch auf die in dieser Erklärung verkündeten Rechte und Freiheiten ohne irgendeinen Unterschied, etwa nach Rasse, Hautfarbe, Geschlecht, Sprache, Religion, politischer oder sonstiger Überzeugung, nationaler oder sozialer Herkunft, Vermögen, Geburt oder sonstigem Stand. Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person. Niemand darf in Sklaverei oder Leibeigenschaft gehalten werden.",
    ),
    (
        "fr",
        "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience et doivent agir les uns envers les autres dans un esprit de fraternité. Chacun peut se prévaloir de tous les droits et de toutes les libertés proclamés dans la présente Déclaration, sans distinction aucune, notamment de race, de couleur, de sexe, de langue, de religion, d'opinion politique ou de toute autre opinion, d'origine nationale ou sociale, de fortune, de naissance ou de toute autre situation. Tout individu a droit à la vie, à la liberté et à la sûreté de sa personne. Nul ne sera tenu en esclavage ni en servitude.",
    ),
    (
        "es",
        "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia, deben comportarse fraternalmente los unos con los otros. Toda persona tiene todos los derechos y libertades proclamados en esta Declaración, sin distinción alguna de raza, color, sexo, idioma, religión, opinión política o de cualquier otra índole, origen nacional o social, posición económica, nacimiento o cualquier otra condición. Todo individuo tiene derecho a la vida, a la libertad y a la seguridad de su persona. Nadie estará sometido a esclavitud ni a servidumbre.",
    ),
    (
        "it",
        "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di coscienza e devono agire gli uni verso gli altri in spirito di fratellanza. Ad ogni individuo spettano tutti i diritti e tutte le libertà enunciate nella presente Dichiarazione, senza distinzione alcuna, per ragioni di razza, di colore, di sesso, di lingua, di religione, di opinione politica o di altro genere, di origine nazionale o sociale, di ricchezza, di nascita o di altra condizione. Ogni individuo ha diritto alla vita, alla libertà ed alla sicurezza della propria persona. Nessun individuo potrà essere tenuto in stato di schiavitù o di servitù.",
    ),
    (
        "nl",
        "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand en geweten, en behoren zich jegens elkander in een geest van broederschap te gedragen. Een ieder heeft aanspraak op alle rechten en vrijheden, in deze Verklaring opgesomd, zonder enig onderscheid van welke aard ook, zoals ras, kleur, geslacht, taal, godsdienst, politieke of andere overtuiging, nationale of maatschappelijke afkomst, eigendom, geboorte of andere status. Een ieder heeft het recht op leven, vrijheid en onschendbaarheid van zijn persoon. Niemand zal in slavernij of horigheid gehouden worden.",
    ),
    (
        "ko",
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다. 모든 사람은 인종, 피부색, 성, 언어, 종교, 정치적 또는 기타의 견해, 민족적 또는 사회적 출신, 재산, 출생 또는 기타의 신분과 같은 어떠한 종류의 차별이 없이 이 선언에 규정된 모든 권리와 자유를 향유할 자격이 있다. 모든 사람은 생명과 신체의 자유와 안전에 대한 권리를 가진다.",
    ),
];

type Trigram = [char; 3];

/// Trigrams of the letters of a text, words apart; and how many letters it has.
fn trigrams(text: &str) -> (HashMap<Trigram, f64>, usize) {
    let mut counts = HashMap::new();
    let mut letters = 0;
    for word in text.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()) {
        letters += word.chars().count();
        let framed: Vec<char> = std::iter::once(' ')
            .chain(word.chars().flat_map(char::to_lowercase))
            .chain(std::iter::once(' '))
            .collect();
        for at in 0..framed.len().saturating_sub(2) {
            *counts.entry([framed[at], framed[at + 1], framed[at + 2]]).or_insert(0.0) += 1.0;
        }
    }
    (counts, letters)
}

/// Logarithms of how probable each trigram is in a language, and of one that the sample does not have.
struct Profile {
    language: &'static str,
    seen: HashMap<Trigram, f64>,
    unseen: f64,
}

/// Trigrams that a language has beyond its sample, roughly.
const TRIGRAMS_OF_A_LANGUAGE: f64 = 4000.0;

fn profiles() -> Vec<Profile> {
    SAMPLES
        .iter()
        .map(|(language, sample)| {
            let (counts, _) = trigrams(sample);
            let total: f64 = counts.values().sum::<f64>() + TRIGRAMS_OF_A_LANGUAGE;
            let seen = counts.into_iter().map(|(key, count)| (key, ((count + 1.0) / total).ln())).collect();
            Profile { language, seen, unseen: (1.0 / total).ln() }
        })
        .collect()
}

fn identify(profiles: &[Profile], text: &str) -> Result<Vec<u8>, ProviderError> {
    let (counts, letters) = trigrams(text);
    if letters == 0 {
        return Err(ProviderError::bad_input("the text has no letter: give at least one word"));
    }
    let score = |profile: &Profile| {
        counts
            .iter()
            .map(|(key, count)| count * profile.seen.get(key).unwrap_or(&profile.unseen))
            .sum::<f64>()
    };
    let mut scores: Vec<(&str, f64)> = profiles.iter().map(|p| (p.language, score(p))).collect();
    scores.sort_by(|a, b| b.1.total_cmp(&a.1));
    // Shares as if each language were as likely as any other before the text was seen.
    let best = scores.first().map_or(0.0, |(_, score)| *score);
    let sum: f64 = scores.iter().map(|(_, score)| (score - best).exp()).sum();
    let lines = scores
        .iter()
        .take(3)
        .map(|(language, score)| format!("{language}\t{:.4}\t{letters}\n", (score - best).exp() / sum));
    Ok(lines.collect::<String>().into_bytes())
}

fn main() -> Result<(), SdkError> {
    let profiles = profiles();
    let spec = ProviderSpec::new("custom/language")
        .kind("language-identifier")
        .describe("tells the language of a text", "UTF-8", "lines: language TAB share TAB letters")
        .fingerprint(1)
        .threads(2);
    let provider = Client::connect()?.provide(spec)?;
    eprintln!("providing {}", provider.model_id());
    provider.serve(|job| match std::str::from_utf8(job.payload()) {
        Ok(text) => identify(&profiles, text),
        Err(error) => Err(ProviderError::bad_input(format!("no UTF-8 at byte {}", error.valid_up_to()))),
    })
}
